"""Differential privacy: clipping, noise, accounting, and the ledger of what is spent. Imports neither flwr nor ray."""
