"""A target that answers HTTP requests with what it received, and takes one connection: a second one is closed at once.

Usage: http_server.py [options]

Options:
  --port PORT          where to listen, on 127.0.0.1; 0 is any free port [default: 8080]
  --max-connections N  served at once; more are refused [default: 1]
  --delay TIME         time of service of each request, such as 500ms or 10s [default: 0]
  -h --help            show this help and exit

Paths: /bytes/N /chunked/N /close/N (N bytes with a length, in chunks, ended by closing), /echo (the body),
/sleep/TIME, /status/CODE; all others answer JSON about the request.
"""

from gmux.samples import command
from gmux.samples.http import HttpTarget

if __name__ == "__main__":
    command.run(HttpTarget, command.parse(__doc__))
