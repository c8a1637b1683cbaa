"""Training speed against the peers: python ablations/bench.py (needs the extra test)"""

from ablations.benchmarks.training import main

if __name__ == "__main__":
    main()
