"""The data of simulated sites: split one data set into the files of many sites."""
