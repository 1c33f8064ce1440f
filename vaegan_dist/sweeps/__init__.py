"""Sweeps without Ray: the space, the ledger of trials, proposals, costs, the live table, results and the report."""
