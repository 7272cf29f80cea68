"""Ray Data: ``build_processor`` makes a stage that completes prompts or answers chats.

from manta.data import build_processor

answered = build_processor("path/or/hub-id", lambda row: {"prompt": row["text"]})(dataset)
"""

from cluster.data import build_processor as build_processor

__all__ = ["build_processor"]
