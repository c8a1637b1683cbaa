"""The best model of a cell, evaluated again: python ablations/evaluate.py runs/quick-digits/flash/seed0"""

from ablations.study.evaluation import main

if __name__ == "__main__":
    main()
