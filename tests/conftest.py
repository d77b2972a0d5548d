"""What all tests need."""

import signal

# A shell that starts a job in the background has it ignore SIGINT, and every child would inherit
# that; some tests press Ctrl-C on one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
