"""Decisions: requests, sequences, block pools, scheduler, plans. Never imports torch or ray."""
