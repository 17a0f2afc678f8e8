"""`python -m trainers dreambench`: the DreamBooth protocol over a data set's subjects. command.py is where to begin."""
