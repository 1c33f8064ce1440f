"""Sweep on the cluster: `ray job submit --working-dir . -- python jobs/sweep.py sweeps/beta.yaml --preset …`."""

import sys

from vaegan_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
