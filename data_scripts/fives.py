"""FIVES, vessels in fundus photographs: 600 training and 200 test images. python data_scripts/fives.py --root data"""
import sys

from qtseg.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", "fives", *sys.argv[1:]]))
