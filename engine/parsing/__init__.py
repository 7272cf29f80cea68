"""What a model writes, taken apart: text, reasoning and tool calls.

Pieces of text go into a ``Parser`` as they come, typed parts come out. A whole answer is the parts
of its stream, folded, so that the two cannot differ. A protocol (chats, Responses, Messages) is a
frame around the parts.

``parts`` has the parts; ``source`` what the formats read from; a file for each family of formats;
``formats`` names them and finds a checkpoint's; ``parser`` puts one together.
"""
