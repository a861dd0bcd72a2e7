"""Files and blobs: whole files on this machine, and copies between files and blobs that resume.

Between the blob client and the faces: the command line copies with it, and so can every other face that has files.
"""
