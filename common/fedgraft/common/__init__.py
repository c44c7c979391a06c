"""The code that client, server and simulation share, because all must agree on it."""

import logging

# peft imports bitsandbytes if it is installed. On stderr it then lists missing kernels and repeats,
# for every 8-bit product, that float32 is rounded.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
