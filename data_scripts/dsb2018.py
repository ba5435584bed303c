"""Data Science Bowl 2018, cell nuclei: 670 images, one mask file per nucleus. python data_scripts/dsb2018.py --root data"""
import sys

from qtseg.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", "dsb2018", *sys.argv[1:]]))
