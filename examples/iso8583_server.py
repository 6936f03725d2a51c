"""A card host that approves everything, and takes one connection: a second one is closed at once.

Usage: iso8583_server.py [options]

Options:
  --port PORT          where to listen, on 127.0.0.1; 0 is any free port [default: 8583]
  --header KIND        the length before each message: binary (2 bytes; gmux's protocol iso8583)
                       or digits (4 ASCII digits; gmux's protocol mpu) [default: binary]
  --max-connections N  served at once; more are refused [default: 1]
  --delay TIME         time of service of each message, such as 500ms or 10s [default: 0]
  -h --help            show this help and exit
"""

from gmux.samples import command
from gmux.samples.iso8583 import BY_HEADER

if __name__ == "__main__":
    words = command.parse(__doc__)
    target_class = command.value(words, "--header", BY_HEADER.__getitem__, " or ".join(BY_HEADER))
    command.run(target_class, words)
