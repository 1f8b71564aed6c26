"""The commands, by name: the module of each, whose `main` runs it, and what it does."""

COMMANDS = {
    "inspect": ("ldm.commands.inspect", "what a folder, an archive, a table of images holds"),
    "train": ("ldm.commands.auto", "from a folder of pictures to a model, with nothing else to type"),
    "fit": ("ldm.commands.fit", "train stage 1 or stage 2"),
    "validate": ("ldm.commands.fit", "measure a checkpoint on the held-out images"),
    "test": ("ldm.commands.fit", "the same, as Lightning's test loop"),
    "encode": ("ldm.commands.fit", "write the latent cache and the latent statistics, and stop"),
    "configs": ("ldm.commands.configs", "list the config files that -c NAME reads"),
    "completion": ("ldm.commands.completion", "what a shell needs to complete ldm's commands and options"),
    "ema": ("ldm.commands.ema", "make an average of the weights of any length, after training"),
    "evaluate": ("ldm.commands.evaluate", "distances (FD, KID) between two sets of images"),
    "likelihood": ("ldm.commands.likelihood", "bits per dimension of images, by the bound and the ODE"),
    "import": ("ldm.commands.import_", "make a model folder of an autoencoder of diffusers"),
    "sample": ("ldm.commands.sample", "pictures: of a class, a text, from an image, on one device or many"),
    "predict": ("ldm.commands.sample", "the same command under Lightning's name"),
    "again": ("ldm.commands.again", "make a picture anew from the settings that it carries"),
    "wav": ("ldm.commands.wav", "sound of pictures of a model of data.Audio"),
    "watermark": ("ldm.commands.watermark", "check whether pictures have the watermark of `ldm sample`"),
}
