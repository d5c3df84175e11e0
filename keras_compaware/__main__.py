"""`python -m keras_compaware`: the same as the console command `keras-compaware`.

The interpreter imports the package, and with it Keras, before this file. So the console command
starts faster, and only it can tell TensorFlow in time to be quiet.
"""

from keras_compaware_console import main

if __name__ == "__main__":
    main()
