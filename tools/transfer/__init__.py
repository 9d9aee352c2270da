"""Moving the data of VDIs in and out: disk images, backups, file copies, rescue."""
