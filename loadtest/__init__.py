"""Load on gmux: `make loadtest` measures what gmux adds to a request, `make bench` how it does beside HAProxy."""
