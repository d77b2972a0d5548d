"""Erasure coding between nodes: the code, and which cells it ties together.

Pure arithmetic and geometry: no IO but for loading ISA-L, no network, and nothing of the rest of
ckptd.
"""

from ckptd.erasure.codec import MAX_SHARDS, Codec, CodecError, ZfecCodec
from ckptd.erasure.engines import (
    AUTO,
    ENGINE_CHOICES,
    Engine,
    engine_in_use,
    engines,
    open_codec,
)
from ckptd.erasure.stripes import (
    Stripe,
    StripeMap,
    default_parity,
    exposures,
    form_groups,
    parity_of_group,
)

__all__ = [
    "AUTO",
    "ENGINE_CHOICES",
    "MAX_SHARDS",
    "Codec",
    "CodecError",
    "Engine",
    "Stripe",
    "StripeMap",
    "ZfecCodec",
    "default_parity",
    "engine_in_use",
    "engines",
    "exposures",
    "form_groups",
    "open_codec",
    "parity_of_group",
]
