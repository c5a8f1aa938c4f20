"""What goes in and comes out: models, their processors, pictures, options, and files written.

Here belongs what is checked before a model is loaded, loading it, and an output file's policy.
May import `spec` and what stands below it, the embedded model, and Transformers' loaders.
"""
