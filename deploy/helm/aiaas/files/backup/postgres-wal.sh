#!/bin/sh
# Receives the write-ahead log into $BACKUP_DIR/wal as it is written, until told to stop. The slot keeps on the server
# what was not received yet: set max_slot_wal_keep_size there, so that an archive that is away cannot fill its disk.
set -eu
umask 077
mkdir -p "$BACKUP_DIR/wal"
slot=${SLOT:-aiaas_archive}
pg_receivewal --directory "$BACKUP_DIR/wal" --slot "$slot" --create-slot --if-not-exists --no-password
# Flushed before it is confirmed, so what the server forgets is on disk here.
exec pg_receivewal --directory "$BACKUP_DIR/wal" --slot "$slot" --synchronous --no-password
