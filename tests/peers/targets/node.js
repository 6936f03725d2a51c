// The routes of all targets, by Node's own server. See http_server.py.
"use strict";
const fs = require("fs");
const http = require("http");
const path = require("path");
const zlib = require("zlib");

const read = (name) => fs.readFileSync(path.join(process.env.PEER_FILES, name));
const files = { "/small": read("small"), "/large": read("large") };
const etags = { "/small": '"0"', "/large": '"1"' };
const text = read("text");
const gzipped = zlib.gzipSync(text);
let open = 0;

function route(request, body) {
  const target = request.url.split("?")[0];
  if (["POST", "PUT", "DELETE"].includes(request.method)) return [200, { "X-Method": request.method }, body];
  if (target in files) {
    const fields = { ETag: etags[target] };
    return request.headers["if-none-match"] === etags[target] ? [304, fields, ""] : [200, fields, files[target]];
  }
  if (target === "/gzip") {
    const accepts = (request.headers["accept-encoding"] || "").includes("gzip");
    return accepts
      ? [200, { "Content-Encoding": "gzip", Vary: "Accept-Encoding" }, gzipped]
      : [200, { Vary: "Accept-Encoding" }, text];
  }
  if (target === "/none") return [204, {}, ""];
  if (target === "/moved") return [302, { Location: "/small" }, ""];
  if (target === "/fields") {
    return [200, Object.fromEntries([...Array(60).keys()].map((n) => [`X-F${n}`, `value ${n}`])), ""];
  }
  if (target === "/tell") {
    const fields = [];
    for (let n = 0; n < request.rawHeaders.length; n += 2) fields.push(request.rawHeaders.slice(n, n + 2));
    return [200, {}, JSON.stringify({ method: request.method, target: request.url, fields })];
  }
  if (target.startsWith("/token/")) return [200, {}, target];
  return [404, {}, "not here\n"];
}

const server = http.createServer((request, response) => {
  const parts = [];
  request.on("data", (part) => parts.push(part));
  request.on("end", () => {
    const [status, fields, body] = route(request, Buffer.concat(parts));
    Object.assign(fields, { "X-Peer": request.socket.remotePort, "X-Open": open });
    // Node sends a body in chunks when its length is not told.
    if (![204, 304].includes(status) && request.method !== "POST") {
      fields["Content-Type"] = "text/plain";
      fields["Content-Length"] = Buffer.byteLength(body);
    }
    response.writeHead(status, fields);
    if (request.method === "POST") response.write(body.subarray(0, 10));
    response.end(request.method === "POST" ? body.subarray(10) : body);
  });
});
// Longer than the tests, or a request may meet the close of an idle connection.
server.keepAliveTimeout = 120000;
server.on("connection", (socket) => {
  open += 1;
  socket.on("close", () => (open -= 1));
});
server.listen(0, "127.0.0.1");
