"""Train on images in a container, stop the job mid-epoch, resume at the exact batch.

``images`` puts scikit-learn's digits into a container and reads them back as a dataset, ``train`` is a
training job as one would write it, and ``python -m recipes.demo`` plays the story on Azurite.
"""
