"""Parts of bodies: the base of all structs (``base``), and the messages and tools of chats (``chat``)."""
