"""BUSI, breast ultrasound: 437 benign and 210 malignant images with masks. python data_scripts/busi.py --root data"""
import sys

from qtseg.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", "busi", *sys.argv[1:]]))
