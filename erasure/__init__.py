"""Erasure coding between nodes: the code, and which cells it ties together.

Pure arithmetic and geometry: no IO, no network, and nothing of the rest of ckptd.
"""

from ckptd.erasure.codec import MAX_SHARDS, Codec, CodecError, ZfecCodec, open_codec
from ckptd.erasure.stripes import (
    Stripe,
    StripeMap,
    default_parity,
    exposures,
    form_groups,
    parity_of_group,
)

__all__ = [
    "MAX_SHARDS",
    "Codec",
    "CodecError",
    "Stripe",
    "StripeMap",
    "ZfecCodec",
    "default_parity",
    "exposures",
    "form_groups",
    "open_codec",
    "parity_of_group",
]
