#include "device_functions.cuh"
