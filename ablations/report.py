"""What a study concludes, rebuilt from its cells: python ablations/report.py runs/NAME [runs/NAME …]"""

from ablations.reporting.compose import main

if __name__ == "__main__":
    main()
