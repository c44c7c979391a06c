"""How one data set becomes the files of many sites."""
