"What holds for every test."

import signal

# a shell that starts the suite in the background has it ignore Ctrl-C, and whatever the tests start would too
signal.signal(signal.SIGINT, signal.default_int_handler)
