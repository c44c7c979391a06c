"""The process at a site: it keeps a session with the coordinator and hands messages on."""
