"""Your own images and masks. python data_scripts/own.py --images A --masks B --folds 5 --patient 'patient(\\d+)'"""
import sys

from qtseg.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", "own", *sys.argv[1:]]))
