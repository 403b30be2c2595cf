"""The command line: ``main`` parses and calls ``jmoe.tools`` or the server."""
