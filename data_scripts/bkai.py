"""BKAI-IGH NeoPolyp-Small, colonoscopy: 1000 images, polyps in two classes. python data_scripts/bkai.py --root data"""
import sys

from qtseg.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", "bkai", *sys.argv[1:]]))
