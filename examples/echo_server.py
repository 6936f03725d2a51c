"""A target that sends each line back, and takes one connection: a second one is closed at once.

Usage: echo_server.py [options]

Options:
  --port PORT          where to listen, on 127.0.0.1; 0 is any free port [default: 1234]
  --max-connections N  served at once; more are refused [default: 1]
  --delay TIME         time of service of each line, such as 500ms or 10s [default: 0]
  -h --help            show this help and exit
"""

from gmux.samples import command
from gmux.samples.echo import EchoTarget

if __name__ == "__main__":
    command.run(EchoTarget, command.parse(__doc__))
