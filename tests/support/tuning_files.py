"""Example tunings for tests."""

from dataclasses import replace

from q4jit.hip.tunings import Key, Machine, Trial, Tunings

MACHINE = Machine("Fake", "gfx1100", "fake 1.0 -O3")
KEY = Key(4096, 4096, "Q4_0", 1, "f32")
FAST = Trial(
    "gemv",
    (("block_size", 64), ("layout", "planar")),
    "0123456789abcdef",
    5.5,
    2e-7,
    "",
    "2026-01-31T12:00:00+00:00",
)
SLOW = replace(FAST, constants=(("block_size", 128), ("layout", "planar")), us=9.0)
WRONG = replace(
    FAST, constants=(("block_size", 256), ("layout", "planar")), us=None, rejected="wrong: …"
)
TRIALS = (FAST, SLOW, WRONG)
TUNINGS: Tunings = {(MACHINE, KEY): TRIALS}
