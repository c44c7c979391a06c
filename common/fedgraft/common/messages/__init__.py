"""The messages between coordinator and sites, with their encoding and their signatures."""
