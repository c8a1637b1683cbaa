"""The command: trains every arm on the same data and compares them.

python ablations/run.py --arms all
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the study listens: no traceback out of an import
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this code, installed or not

from ablations.commands.main import main

if __name__ == "__main__":
    main()
