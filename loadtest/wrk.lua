-- Each request has a path of its own; at the end a line for loadtest/wrk.py. Times are microseconds.
local threads = 0

function setup(thread)
   thread:set("number", threads)
   threads = threads + 1
end

function init()
   asked = 0
end

function request()
   asked = asked + 1
   return wrk.format("GET", "/" .. number .. "-" .. asked)
end

function done(summary, latency)
   local e = summary.errors
   local errors = e.connect + e.read + e.write + e.status + e.timeout
   io.write(string.format("RESULT %d %d %d %d %d\n", summary.requests, summary.duration, errors,
      latency:percentile(50), latency:percentile(99)))
end
