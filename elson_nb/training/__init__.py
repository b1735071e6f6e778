"""Base models, examples, phases."""
import logging

# At import it reports that an optional CPU kernel is missing; nothing here uses that kernel.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
