#!/bin/sh
# Boots the system in the directory $1, with all that it starts in the control group $2. Runs in a mount namespace of its
# own, once in front of the other namespaces and once in them.
set -eu
root=$1
group=$2

if [ "${3:-}" = inside ]; then
    # The root of what is seen inside is our own group.
    umount "$root/sys/fs/cgroup"
    mount -t proc proc "$root/proc"
    # It is to change no setting of the kernel that it shares.
    mount --bind "$root/proc/sys" "$root/proc/sys"
    mount -o remount,bind,ro "$root/proc/sys"
    mount -t sysfs -o ro sysfs "$root/sys"
    mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
    mount -t tmpfs tmpfs "$root/run"
    mount -t tmpfs tmpfs "$root/dev"
    for device in null zero full random urandom tty; do
        touch "$root/dev/$device"
        mount --bind "/dev/$device" "$root/dev/$device"
    done
    ln -s pts/ptmx "$root/dev/ptmx"
    cd "$root"
    mkdir -p .outside
    pivot_root . .outside
    umount -l /.outside
    rmdir /.outside
    exec env -i container=vhostd PATH=/usr/sbin:/usr/bin:/sbin:/bin setpriv --bounding-set=-sys_module,-sys_rawio,-sys_time \
        /lib/systemd/systemd --show-status=no --unit=multi-user.target
fi

mount --bind "$root" "$root"
mkdir -p "$root/sys/fs/cgroup"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mkdir "$root/sys/fs/cgroup/$group"
echo $$ > "$root/sys/fs/cgroup/$group/cgroup.procs"
exec unshare --cgroup --pid --uts --ipc --net --fork --kill-child sh "$0" "$root" "$group" inside
