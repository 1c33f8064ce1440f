"""Encode a data set on the cluster: `ray job submit --working-dir . -- python jobs/encode.py RUN OUTPUT …`."""

import sys

from vaegan_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["encode", "--runtime", "ray", *sys.argv[1:]]))
