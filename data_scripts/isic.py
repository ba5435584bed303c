"""ISIC challenges 2016, 2017 and 2018 (task 1), skin lesions. python data_scripts/isic.py --year 2016 --root data

--official-split: the test images validate, as in the official code; only to compare with the paper's figures.
"""
import argparse
import sys

from qtseg.cli import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--year", choices=("2016", "2017", "2018"), default="2016")
    parser.add_argument("--official-split", action="store_true")
    chosen, others = parser.parse_known_args()
    sys.exit(main(["prepare", f"isic{chosen.year}{'_official' * chosen.official_split}", *others]))
