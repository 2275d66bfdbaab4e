/* Records what a process does to the files of one folder, in the one order in which the kernel saw it.
 *
 *     cc -O2 -fPIC -shared -o recorder.so powerloss_recorder.c -ldl -lpthread
 *     LD_PRELOAD=recorder.so POWERLOSS_FOLDER=/absolute/folder POWERLOSS_LOG=/elsewhere/log command ...
 *
 * Linux. One lock is held across each call and its record, so that the log's order is the true one across threads. Only
 * absolute paths directly in the folder are recorded, and never those that end in "-shm": what is mapped does not pass
 * through here, and SQLite builds that file anew; nor in "-reserve": nothing is in that. tests/powerloss.py reads the log, and its test compares the folder
 * with it byte by byte, so that a call that is missing here is found.
 *
 * A record: kind, length of the data (32 bits each); file, number (64 bits each); then the data.
 *   O file: an existing file was opened, data its name     C file: created, data its name
 *   W file, number: written at that offset                 T file, number: truncated to that size
 *   S file: synced; 0 is the folder                        U: unlinked, data its name
 *   L, R: linked, renamed; data both names, a NUL between
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define DESCRIPTORS 4096
#define FILES 4096
#define UNWATCHED -1
#define FOLDER 0

static pthread_mutex_t order = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static char folder[PATH_MAX];
static size_t folder_length;
static int log_descriptor = -1;
/* What each descriptor stands for, plus one; 0 is unwatched. */
static int64_t watched[DESCRIPTORS];
/* Inodes are used again after an unlink; the numbers in the log are not. */
static ino_t inodes[FILES];
static int64_t newest_file = FOLDER;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static void fail(const char *what) {
    static const char prefix[] = "powerloss_recorder: ";
    (void)!syscall(SYS_write, 2, prefix, sizeof prefix - 1);
    (void)!syscall(SYS_write, 2, what, strlen(what));
    (void)!syscall(SYS_write, 2, "\n", 1);
    _exit(97);
}

__attribute__((constructor)) static void begin(void) {
    const char *where = getenv("POWERLOSS_FOLDER"), *log = getenv("POWERLOSS_LOG");
    if (where == NULL || log == NULL || where[0] != '/' || strlen(where) >= sizeof folder)
        fail("POWERLOSS_FOLDER and POWERLOSS_LOG must be set");
    strcpy(folder, where);
    folder_length = strlen(folder);
    log_descriptor = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (log_descriptor < 0)
        fail("the log cannot be written");
}

static void record(uint32_t kind, int64_t file, int64_t number, const void *data, size_t length) {
    struct { uint32_t kind, length; int64_t file, number; } head = {kind, (uint32_t)length, file, number};
    struct iovec parts[2] = {{&head, sizeof head}, {(void *)data, length}};
    ssize_t written = syscall(SYS_writev, log_descriptor, parts, 2);
    if (written != (ssize_t)(sizeof head + length))
        fail("the log cannot be written");
}

/* The name of what lies directly in the folder, "" for the folder itself, NULL for all else. */
static const char *name_of(const char *path) {
    if (path == NULL || folder_length == 0 || strncmp(path, folder, folder_length) != 0)
        return NULL;
    const char *rest = path + folder_length;
    if (*rest == 0)
        return rest;
    if (*rest != '/' || strchr(rest + 1, '/') != NULL)
        return NULL;
    size_t length = strlen(++rest);
    if (length >= 4 && strcmp(rest + length - 4, "-shm") == 0)
        return NULL;
    if (length >= 8 && strcmp(rest + length - 8, "-reserve") == 0)
        return NULL;
    return rest;
}

static int64_t file_of(int descriptor) {
    return descriptor >= 0 && descriptor < DESCRIPTORS ? watched[descriptor] - 1 : UNWATCHED;
}

static void opened(int descriptor, const char *name, int flags, int existed) {
    if (descriptor < 0)
        return;
    if (descriptor >= DESCRIPTORS)
        fail("too many descriptors");
    watched[descriptor] = 0;
    if (name == NULL)
        return;
    int64_t file = FOLDER;
    if (*name != 0) {
        struct stat status;
        if (fstat(descriptor, &status) != 0)
            fail("fstat failed");
        for (file = newest_file; existed && file > FOLDER && inodes[file] != status.st_ino; file--) {
        }
        if (!existed || file == FOLDER) {
            if (++newest_file >= FILES)
                fail("too many files");
            file = newest_file;
            inodes[file] = status.st_ino;
            record(existed ? 'O' : 'C', file, 0, name, strlen(name));
        }
        if (existed && (flags & O_TRUNC) && (flags & O_ACCMODE) != O_RDONLY)
            record('T', file, 0, NULL, 0);
    }
    watched[descriptor] = file + 1;
}

#define OPEN(function, declaration, arguments)                                                                         \
    int function declaration {                                                                                         \
        mode_t mode = 0;                                                                                               \
        if (flags & (O_CREAT | O_TMPFILE)) {                                                                           \
            va_list rest;                                                                                              \
            va_start(rest, flags);                                                                                     \
            mode = va_arg(rest, mode_t);                                                                               \
            va_end(rest);                                                                                              \
        }                                                                                                              \
        pthread_mutex_lock(&order);                                                                                    \
        const char *name = name_of(path);                                                                              \
        struct stat status;                                                                                            \
        int existed = name != NULL && stat(path, &status) == 0;                                                        \
        int descriptor = REAL(function) arguments, error = errno;                                                      \
        opened(descriptor, name, flags, existed);                                                                      \
        pthread_mutex_unlock(&order);                                                                                  \
        errno = error;                                                                                                 \
        return descriptor;                                                                                             \
    }

OPEN(open, (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, (int at, const char *path, int flags, ...), (at, path, flags, mode))
OPEN(openat64, (int at, const char *path, int flags, ...), (at, path, flags, mode))

/* Runs the real call and records it when it succeeded; `done` is what it returned. */
#define RECORDED(type, call, condition, what)                                                                          \
    pthread_mutex_lock(&order);                                                                                        \
    type done = call;                                                                                                  \
    int error = errno;                                                                                                 \
    if (condition)                                                                                                     \
        what;                                                                                                          \
    pthread_mutex_unlock(&order);                                                                                      \
    errno = error;                                                                                                     \
    return done

/* So that nothing is written and not recorded because the process ended in between. */
void _exit(int status) {
    pthread_mutex_lock(&order);
    syscall(SYS_exit_group, status);
    __builtin_unreachable();
}

int close(int descriptor) {
    RECORDED(int, (watched[descriptor >= 0 && descriptor < DESCRIPTORS ? descriptor : 0] = 0, REAL(close)(descriptor)),
             0, (void)0);
}

ssize_t write(int descriptor, const void *data, size_t length) {
    RECORDED(ssize_t, REAL(write)(descriptor, data, length), done > 0 && file_of(descriptor) > FOLDER,
             record('W', file_of(descriptor), lseek(descriptor, 0, SEEK_CUR) - done, data, (size_t)done));
}

#define PWRITE(function, offset_type)                                                                                  \
    ssize_t function(int descriptor, const void *data, size_t length, offset_type offset) {                            \
        RECORDED(ssize_t, REAL(function)(descriptor, data, length, offset), done > 0 && file_of(descriptor) > FOLDER,  \
                 record('W', file_of(descriptor), offset, data, (size_t)done));                                        \
    }

PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define FTRUNCATE(function, size_type)                                                                                 \
    int function(int descriptor, size_type size) {                                                                     \
        RECORDED(int, REAL(function)(descriptor, size), done == 0 && file_of(descriptor) > FOLDER,                     \
                 record('T', file_of(descriptor), size, NULL, 0));                                                     \
    }

FTRUNCATE(ftruncate, off_t)
FTRUNCATE(ftruncate64, off64_t)

#define SYNC(function)                                                                                                 \
    int function(int descriptor) {                                                                                     \
        RECORDED(int, REAL(function)(descriptor), done == 0 && file_of(descriptor) != UNWATCHED,                       \
                 record('S', file_of(descriptor), 0, NULL, 0));                                                        \
    }

SYNC(fsync)
SYNC(fdatasync)

static void record_pair(uint32_t kind, const char *from, const char *to) {
    char both[2 * PATH_MAX];
    if (from == NULL || to == NULL)
        fail("a link or a rename leads out of the folder, or into it");
    int length = snprintf(both, sizeof both, "%s%c%s", from, 0, to);
    record(kind, 0, 0, both, (size_t)length);
}

int unlink(const char *path) {
    const char *name = name_of(path);
    RECORDED(int, REAL(unlink)(path), done == 0 && name != NULL, record('U', 0, 0, name, strlen(name)));
}

int unlinkat(int at, const char *path, int flags) {
    const char *name = name_of(path);
    RECORDED(int, REAL(unlinkat)(at, path, flags), done == 0 && name != NULL, record('U', 0, 0, name, strlen(name)));
}

int link(const char *path, const char *other) {
    const char *from = name_of(path), *to = name_of(other);
    RECORDED(int, REAL(link)(path, other), done == 0 && (from || to), record_pair('L', from, to));
}

int linkat(int at, const char *path, int other_at, const char *other, int flags) {
    const char *from = name_of(path), *to = name_of(other);
    RECORDED(int, REAL(linkat)(at, path, other_at, other, flags), done == 0 && (from || to),
             record_pair('L', from, to));
}

int rename(const char *path, const char *other) {
    const char *from = name_of(path), *to = name_of(other);
    RECORDED(int, REAL(rename)(path, other), done == 0 && (from || to), record_pair('R', from, to));
}
