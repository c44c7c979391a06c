"""What coordinator and sites say to each other, and how it is encoded and signed."""
