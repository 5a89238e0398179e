#!/bin/sh
# Makes an empty folder, $1, a data folder of PostgreSQL from the newest base backup (or that of the name $2) and all of
# the write-ahead log in $BACKUP_DIR. Then start a server of the same version on it; it recovers, and leaves recovery.
# RESTORE_TO, a time as PostgreSQL writes it, stops before what happened later.
set -eu
umask 077
data=$1
base=${2:-$(ls "$BACKUP_DIR/base" | grep -v unfinished | sort | tail -n 1)}
[ -n "$base" ] && [ -f "$BACKUP_DIR/base/$base/base.tar.gz" ] || { echo "no base backup in $BACKUP_DIR/base" >&2; exit 1; }
[ ! -e "$data" ] || [ -z "$(ls -A "$data")" ] || { echo "$data is not empty: nothing is overwritten" >&2; exit 1; }
mkdir -p "$data"
chmod 700 "$data"
tar -xzf "$BACKUP_DIR/base/$base/base.tar.gz" -C "$data"
tar -xzf "$BACKUP_DIR/base/$base/pg_wal.tar.gz" -C "$data/pg_wal"
# What was being written last is in a file called .partial: it is a whole one as far as it goes.
{
    echo "restore_command = 'cp \"$BACKUP_DIR/wal/%f\" \"%p\" 2>/dev/null || cp \"$BACKUP_DIR/wal/%f.partial\" \"%p\"'"
    echo "recovery_target_action = 'promote'"
    [ -z "${RESTORE_TO:-}" ] || echo "recovery_target_time = '$RESTORE_TO'"
} >>"$data/postgresql.auto.conf"
: >"$data/recovery.signal"
echo "restored $base"
