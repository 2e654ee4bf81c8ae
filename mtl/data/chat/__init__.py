"""Chats: rows of messages, templates that write them out, the tokens and weights that training takes, and samples made of them."""
