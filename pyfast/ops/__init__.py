"""The ops: schema, fake, autograd, validation and choice of backend, one file each."""
