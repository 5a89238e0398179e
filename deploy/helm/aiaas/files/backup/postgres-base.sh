#!/bin/sh
# A base backup into $BACKUP_DIR/base/<time>, whole or not at all; keeps the newest $KEEP_BASES and the write-ahead log
# since the oldest of them. PGHOST, PGUSER and their like say of which server.
set -eu
umask 077
name=$(date -u +%Y%m%dT%H%M%SZ)
mkdir -p "$BACKUP_DIR/base" "$BACKUP_DIR/wal"
rm -rf "$BACKUP_DIR"/base/*.unfinished
pg_basebackup --pgdata "$BACKUP_DIR/base/$name.unfinished" --format tar --gzip --wal-method stream \
    --checkpoint fast --no-password --label "$name"
sync
mv "$BACKUP_DIR/base/$name.unfinished" "$BACKUP_DIR/base/$name"
ls "$BACKUP_DIR/base" | sort -r | tail -n "+$((KEEP_BASES + 1))" | while read -r old; do
    rm -rf "$BACKUP_DIR/base/$old"
done
# The oldest base that is kept begins at this file; what was written before it is of no use to any.
oldest=$(ls "$BACKUP_DIR/base" | sort | head -n 1)
tar -xzOf "$BACKUP_DIR/base/$oldest/base.tar.gz" backup_label |
    sed -n 's/^START WAL LOCATION.*(file \([0-9A-F]\{24\}\))$/\1/p' | {
    read -r first
    [ -z "$first" ] || pg_archivecleanup "$BACKUP_DIR/wal" "$first"
}
echo "base backup $name"
