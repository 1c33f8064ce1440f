"""Evaluate a model on the cluster: `ray job submit --working-dir . -- python jobs/evaluate.py RUN …`."""

import sys

from vaegan_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", "--runtime", "ray", *sys.argv[1:]]))
