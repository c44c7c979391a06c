"""What client, server and simulation must agree on."""

import logging

# Where it is installed peft imports it, and it says on stderr which kernels it did not find, and at
# every product in 8 bits that float32 is rounded for it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
