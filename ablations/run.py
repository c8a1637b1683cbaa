"""The command: trains every arm on the same data and compares them.

python ablations/run.py --arms all
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the study listens: no traceback out of an import

from ablations.commands.main import main

if __name__ == "__main__":
    main()
