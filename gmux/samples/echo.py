"""The echo target: each line comes back as it is."""

from __future__ import annotations

from gmux.codecs.echo import EchoCodec
from gmux.samples.target import FrameTarget


class EchoTarget(FrameTarget):
    protocol = "echo"
    codec_class = EchoCodec

    def answer(self, frame: bytes) -> bytes:
        return frame
